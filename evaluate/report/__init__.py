"""Results for readers: the terminal, Markdown, the HTML page and its figures."""
