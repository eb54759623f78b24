"""One parameter's gradient over all its uses, as rows."""
