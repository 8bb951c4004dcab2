"""x"""
ANSWERS = {}
