//go:build system

package lab_test

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"foothold/lab"
	"foothold/lab/control"
	"foothold/lab/ground"
	"foothold/protocol/digest"
	"foothold/tenant/hostclient"
	"foothold/tenant/orchestrator"

	"github.com/google/go-tpm/tpm2"
)

// quoteVariable makes this test's program ask the host of the lab in that directory
// for a static quote, as the orchestrator does, and print the registers' digest.
const quoteVariable = "FOOTHOLD_TEST_QUOTE"

func printQuote(dir string) error {
	state := lab.State{Dir: dir}
	conf, err := orchestrator.ReadConfig(state.Tenant("orchestrator.yaml"))
	if err != nil {
		return err
	}
	cert, provider, err := conf.HostTLS.Load()
	if err != nil {
		return err
	}
	c := hostclient.New(ground.HostName, netip.AddrPortFrom(lab.Address(lab.Host, lab.MgmtLAN), 8443), cert, provider)
	var qualifying digest.SHA256
	rand.Read(qualifying[:])
	rsp, err := c.Quote(context.Background(), qualifying)
	if err != nil {
		return err
	}
	attest, err := tpm2.Unmarshal[tpm2.TPMSAttest](rsp.Quote.Attest)
	if err != nil {
		return err
	}
	quoted, err := attest.Attested.Quote()
	if err != nil {
		return err
	}
	fmt.Println(hex.EncodeToString(quoted.PCRDigest.Buffer))
	return nil
}

func (l *testLab) quote() string {
	l.t.Helper()
	self, err := os.Executable()
	if err != nil {
		l.t.Fatal(err)
	}
	sum := strings.TrimSpace(l.must("exec", lab.Tenant, "--", "env", quoteVariable+"="+l.dir, self))
	if len(sum) != 64 {
		l.t.Fatalf("no quote: %q", sum)
	}
	return sum
}

// TestOneChangedByteChangesTheQuote: each file of the platform counts, a host boot with
// the same files does not, and a restart of the agent within a boot does not.
func TestOneChangedByteChangesTheQuote(t *testing.T) {
	l := newLab(t)
	l.must("up")
	good := l.quote()
	l.must("restart", "--signal", "9", "host")
	eventually(t, "the agent serves again", func() bool {
		for _, d := range l.status().Daemons {
			if d.Name == "host" {
				return d.State == control.Serving && d.Restarts == 1
			}
		}
		return false
	})
	if again := l.quote(); again != good {
		t.Error("a restart of the agent changed the quote")
	}
	l.must("down")
	l.must("up")
	if again := l.quote(); again != good {
		t.Error("a boot of the same files changed the quote")
	}
	l.must("down")
	seen := map[string]string{good: "the installed release"}
	for _, name := range ground.PlatformFiles() {
		file := filepath.Join(ground.ReleaseDir(lab.State{Dir: l.dir}), name)
		before, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, append(append([]byte{}, before...), '\n'), 0o700); err != nil {
			t.Fatal(err)
		}
		l.must("up")
		sum := l.quote()
		l.must("down")
		if other, ok := seen[sum]; ok {
			t.Errorf("with a byte more in %s the quote is that of %s", name, other)
		}
		seen[sum] = name
		if err := os.WriteFile(file, before, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	l.must("up")
	if again := l.quote(); again != good {
		t.Error("the restored release has another quote")
	}
}
