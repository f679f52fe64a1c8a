"""What is supported: each timm name, each method on each family, and the papers' figures."""
