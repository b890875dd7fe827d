"""Functions of plain arrays: no Ray, no files."""
