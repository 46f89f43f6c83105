"""Backend selection: checks, call spec, rules, cost model, route, explanation."""
