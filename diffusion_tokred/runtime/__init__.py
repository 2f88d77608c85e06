"""Floor 2: what happens during a run. The tracker, the ledger of changes, sites, the tap, run statistics."""
