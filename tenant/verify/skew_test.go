package verify

import (
	"crypto/ed25519"
	"strings"
	"testing"
	"time"

	"foothold/protocol/platform"
	"foothold/protocol/signed"
)

// TestClocksOfSigners: a provider's or release's clock, or ours, may be off by ten
// minutes; past what is borne the refusal names the clock and the difference.
func TestClocksOfSigners(t *testing.T) {
	w := newWorld(t)
	invKey, platKey := w.inv.Public().(ed25519.PublicKey), w.plat.Public().(ed25519.PublicKey)
	inv, man := w.inventory(), w.manifest()
	lasts := inv.Expires.Sub(inv.Issued)
	for _, c := range []struct {
		off  time.Duration // of the signer's clock
		want string
	}{
		{-10 * time.Minute, ""},
		{0, ""},
		{10 * time.Minute, ""},
		{clockSkew, ""},
		{20 * time.Minute, "20m0s ahead of this machine's clock"},
	} {
		inv.Issued, inv.Expires = w.now.Add(c.off), w.now.Add(c.off+lasts)
		man.ValidFrom = w.now.Add(c.off)
		_, err := ParseInventory(seal(t, w.inv, signed.Inventory, inv), invKey, w.makers(), w.now)
		_, err2 := ParsePlatform(seal(t, w.plat, signed.Platform, man), platKey, platform.Lab, w.now)
		for what, err := range map[string]error{"inventory": err, "reference values": err2} {
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%s signed by a clock that is off by %v: %v", what, c.off, err)
			}
		}
	}
}
