package orchestrator

import "foothold/tenant/ledger"

// resumeAct goes on with what the orchestrator itself drives in a phase.
func (o *Orchestrator) resumeAct(r ledger.Reservation) {}
