"""From media and a question to an answer and what it cost."""
