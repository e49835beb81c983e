"""From measured rows to tables, charts, pages and PDFs."""
