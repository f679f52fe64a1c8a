"""All that is known of a file, on one page."""
