"""Where and how the members of a role run: as Ray actors, or in this process. Knows no role."""
