package verify

import (
	"fmt"
	"testing"
	"time"

	"foothold/protocol/vmspec"
)

// TestLeavesAreRememberedAsTheyWere: a certificate that was believed is believed again with
// the same authority and name, while both certificates are valid, and not otherwise.
func TestLeavesAreRememberedAsTheyWere(t *testing.T) {
	ca, other := selfSigned(t, "ca", nil), selfSigned(t, "ca", nil)
	leaf := selfSigned(t, "boot.foothold.internal", &ca)
	boot := vmspec.Boot{CA: ca.der, ServerName: "boot.foothold.internal"}
	now := time.Now()
	var l leaves
	for range 2 {
		if err := l.believable(leaf.der, boot, now); err != nil {
			t.Fatal(err)
		}
	}
	if len(l.known) != 1 {
		t.Fatalf("%d are remembered", len(l.known))
	}
	ends := leaf.cert.NotAfter
	if ca.cert.NotAfter.Before(ends) {
		ends = ca.cert.NotAfter
	}
	begins := leaf.cert.NotBefore
	if ca.cert.NotBefore.After(begins) {
		begins = ca.cert.NotBefore
	}
	for name, c := range map[string]struct {
		leaf []byte
		boot vmspec.Boot
		at   time.Time
	}{
		"another authority":   {leaf.der, vmspec.Boot{CA: other.der, ServerName: boot.ServerName}, now},
		"another name":        {leaf.der, vmspec.Boot{CA: ca.der, ServerName: "gateway.foothold.internal"}, now},
		"another certificate": {selfSigned(t, "boot.foothold.internal", &other).der, boot, now},
		"altered":             {append(append([]byte(nil), leaf.der[:len(leaf.der)-1]...), leaf.der[len(leaf.der)-1]^1), boot, now},
		"expired":             {leaf.der, boot, ends.Add(time.Second)},
		"not yet valid":       {leaf.der, boot, begins.Add(-time.Second)},
	} {
		_, plain := believable(c.leaf, c.boot, c.at)
		if err := l.believable(c.leaf, c.boot, c.at); err == nil || plain == nil || err.Error() != plain.Error() {
			t.Errorf("%s: %v, want %v", name, err, plain)
		}
	}
	for _, at := range []time.Time{begins, ends} {
		_, plain := believable(leaf.der, boot, at)
		if err := l.believable(leaf.der, boot, at); err != nil || plain != nil {
			t.Errorf("at its limit: %v, %v", err, plain)
		}
	}
	for i := range 2 * maxLeaves {
		b := boot
		b.ServerName = fmt.Sprintf("b%d.foothold.internal", i)
		if err := l.believable(selfSigned(t, b.ServerName, &ca).der, b, now); err != nil {
			t.Fatal(err)
		}
	}
	if len(l.known) > maxLeaves {
		t.Errorf("%d are remembered", len(l.known))
	}
}
