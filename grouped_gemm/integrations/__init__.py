"""Where other libraries call this package."""
