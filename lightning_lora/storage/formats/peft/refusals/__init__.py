"""What PEFT cannot hold, or would compute otherwise.

It is refused before anything is written.
"""
