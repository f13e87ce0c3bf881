"""Work on recorded loads, away from any engine: `eplb-fsm plan` and `eplb-fsm compare`."""
