"""The recipes that come with switchkd, as data."""
