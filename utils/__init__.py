"""Everything the four notebooks share.

Import the modules one by one (`from utils import adapters, plots`): this file imports nothing, so that a script which
needs only the configuration starts at once.
"""
