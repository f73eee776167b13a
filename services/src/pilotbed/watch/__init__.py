"""What a host is like, and what of it nobody has declared: `facts` on any machine's words, `cli` on the host itself."""
