"""One self-contained HTML page of compared methods: what it shows, its figures, its text."""
