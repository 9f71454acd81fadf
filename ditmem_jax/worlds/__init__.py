"""Physics with known answers: made-up planets, simulated, rendered, captioned, measured again from pixels."""
