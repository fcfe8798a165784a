"""Network parts shared by two or more methods.

What one method alone needs stays in its own folder, and nothing here knows a method.
"""
