"""What teachers need: an edition without solutions for students, and grades for what they hand in."""
