"""The parts of the family sheet (`tests/family_sheet.py`): tiny models, right values, ptd's values, and the page."""
