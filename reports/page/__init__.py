"""What results_page.py makes reports/index.html of: reading rows, markup, charts; the template, style and script."""
