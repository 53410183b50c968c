package orchestrator

import (
	"context"
	"testing"

	"foothold/internal/mtls"
	"foothold/protocol/api"
	"foothold/protocol/token"
	"foothold/protocol/upstream"
	"foothold/tenant/reservation"
)

// TestCallerThatIsGone: a gateway that is killed in the middle of its call does not end
// the VM: what the call began is ended without it.
func TestCallerThatIsGone(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	g := w.take(w.create(api.CreateVM{Name: "web"}).ID)
	g.upTo(token.T3)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	out, err := w.o.gatewayAdmit(ctx, mtls.Identity{Role: mtls.Gateway, Name: "gateway"}, upstream.AdmitRequest{T3: g.hand.T3, User: g.hand.User,
		Password: g.hand.Password, Certificate: g.hand.Certificate, Source: g.address(), Address: g.tunnel})
	if err != nil || out.Reservation != g.id {
		t.Fatalf("%+v, %v", out, err)
	}
	if vm := w.vm("web"); vm.Phase != string(reservation.Connecting) || vm.Reason != "" {
		t.Errorf("%+v", vm)
	}
}
