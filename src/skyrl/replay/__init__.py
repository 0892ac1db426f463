"""The Selective Sample Buffer: what is kept, what is drawn, and how much of it a step replays."""
