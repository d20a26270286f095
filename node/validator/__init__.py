"""The validator role: looks at drawn jobs again and says what it found, once, whatever happens meanwhile."""
