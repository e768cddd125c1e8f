"""What is known of a compiled step, for eyes: text, a terminal, a page. It decides nothing and measures nothing."""
