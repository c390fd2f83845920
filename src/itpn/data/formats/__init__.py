"""Image files of science and industry: one file per library that reads them."""
