"""What is examined: a file for every way to move weights, with both halves beside each other.

protocol.py says what a subject is, registry.py which ones there are. A new one is a file here and its tests.
"""

from suite.subjects.protocol import Subject, from_plain, load
from suite.subjects.registry import SUBJECTS, known_subjects, subject_from

__all__ = ["SUBJECTS", "Subject", "from_plain", "known_subjects", "load", "subject_from"]
