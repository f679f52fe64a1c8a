"""Images and what is learned from them."""
