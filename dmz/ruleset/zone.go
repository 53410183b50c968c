package ruleset

import (
	"fmt"
	"net"

	"foothold/dmz/upstream"
	"foothold/protocol/zone"
)

// FromZone turns a document's flow into a flow with its end on this machine's clock.
// A standing flow without a time of its own has no end.
func FromZone(f zone.Flow, s *upstream.State) (Flow, error) {
	out := Flow{ID: f.ID, Reservation: f.Reservation, Proto: f.Proto, Port: f.Port, Until: Forever}
	if f.Reservation != "" || f.TTL != 0 {
		out.Until = s.Until(f.TTL)
	}
	var err error
	if out.From, err = endpoint(f.From); err != nil {
		return Flow{}, fmt.Errorf("flow %q: %w", f.ID, err)
	}
	if out.To, err = endpoint(f.To); err != nil {
		return Flow{}, fmt.Errorf("flow %q: %w", f.ID, err)
	}
	return out, out.check()
}

func endpoint(e zone.Endpoint) (Endpoint, error) {
	out := Endpoint{Prefix: e.Prefix}
	if e.MAC == "" {
		return out, nil
	}
	mac, err := net.ParseMAC(e.MAC)
	if err != nil || len(mac) != 6 {
		return out, fmt.Errorf("%q is no MAC address", e.MAC)
	}
	out.MAC = mac
	return out, nil
}
