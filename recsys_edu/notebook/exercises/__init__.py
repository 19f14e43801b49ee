"""The exercises of each notebook, one file per notebook (`nb01.py` holds those of notebook 01)."""
