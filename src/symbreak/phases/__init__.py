"""Diagnosis: one file a phenomenon; questions to laws and denoisers, answers as critical times."""
