"""From a call to a decision: checks, rules, cost model, explanation."""
