"""How many channels go: until a budget in costs, measured time or agreement is met."""
