"""What merging, int8, search and learning do to a model that is really trained."""
