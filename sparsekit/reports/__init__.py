"""One self-contained page that says what runs were, what they did, and what their layers do."""
