"""One file a family of requirements. A test reads as the requirement that it judges."""
