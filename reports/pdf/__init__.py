"""What report.py fills the three PDF reports with."""
