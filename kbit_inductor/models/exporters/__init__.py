"""Writers of other projects' formats: what they hold exactly, and an error for the rest."""
