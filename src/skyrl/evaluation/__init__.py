"""What is measured of the policy on the held-out prompts, and when."""
