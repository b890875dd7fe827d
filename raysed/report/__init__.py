"""Results turned into tables, figures and pages."""
