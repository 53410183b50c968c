package orchestrator

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"foothold/internal/luks"
	"foothold/internal/secret"
	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/tenant/reservation"
)

// This file looks for what is left of starts that are over in the orchestrator's files: vault,
// database with its log and free pages, consoles. e2e.TestSecretsStayWhereTheyBelong looks
// everywhere, memory too, while a start that went well is under way.

// remains are the secrets of one start, by what they are.
type remains map[string][]byte

// secrets are those that the start has come to know, as far as it came.
func (g *guest) secrets() remains {
	g.w.t.Helper()
	r := remains{"T1": []byte(g.vm.t1.Reveal())}
	if t2 := g.unique.T2.Reveal(); t2 != "" {
		r["T2"] = []byte(t2)
	}
	if len(g.hand.Volume.Header) == 0 {
		return r
	}
	template, volume := g.passphrases()
	r["T3"], r["password"] = []byte(g.hand.T3.Reveal()), bytes.Clone(g.hand.Password.Reveal())
	r["template's passphrase"], r["volume's passphrase"] = template.Reveal(), volume.Reveal()
	for what, key := range map[string]struct {
		header []byte
		phrase []byte
	}{"template's key": {g.hand.Template.Header, template.Reveal()}, "volume's key": {g.hand.Volume.Header, volume.Reveal()}} {
		opened, err := luks.Unlock(key.header, secret.New(bytes.Clone(key.phrase)))
		check(g.w.t, err)
		r[what] = bytes.Clone(opened.Reveal())
	}
	return r
}

// left lists the secrets that lie in files below the folder, raw, in hex or in base64.
func (r remains) left(t *testing.T, dir string) (found []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for what, value := range r {
			code := base64.RawStdEncoding.EncodeToString(value[:len(value)/3*3])
			for _, form := range []string{string(value), hex.EncodeToString(value), strings.ToUpper(hex.EncodeToString(value)),
				code, strings.NewReplacer("+", "-", "/", "_").Replace(code)} {
				if bytes.Contains(data, []byte(form)) {
					found = append(found, what+" in "+filepath.Base(path))
					break
				}
			}
		}
		return nil
	})
	check(t, err)
	slices.Sort(found)
	return found
}

func TestNothingRemainsOfAStart(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config) { c.Limits.VMs = 20 })
	w.template("debian")
	clean := func(when string, r remains) {
		t.Helper()
		if found := r.left(t, w.conf.State); len(found) > 0 {
			t.Errorf("%s: %q", when, found)
		}
	}

	// Stopped at its host while it boots, with T2 on its way.
	g := w.take(w.create(api.CreateVM{Name: "booting", Restart: string(reservation.Never)}).ID)
	if why := g.boot(); why != "" {
		t.Fatal(why)
	}
	booting := g.secrets()
	w.host.stop(g.id, event.GuestPoweredOff)
	w.waitPhase(g.id, reservation.Aborted)
	clean("a start that ended while booting", booting)

	// Ended in unlocking, with everything handed over.
	g = w.take(w.create(api.CreateVM{Name: "unlocking", Restart: string(reservation.Never)}).ID)
	g.tweak.handover = "disk-refused"
	if why := g.boot(); why != "" {
		t.Fatal(why)
	}
	g.door()
	g.ready()
	w.waitPhase(g.id, reservation.Aborted)
	unlocking := g.secrets()
	clean("a start that ended in unlocking", unlocking)

	// Restarted: of both starts.
	old := w.computing("web")
	first := old.secrets()
	if len(first) != 8 {
		t.Fatalf("%d secrets of a whole start", len(first))
	}
	w.ask("restart", "web")
	old.say()
	w.host.stop(old.id, event.GuestPoweredOff)
	g = w.takeStart(old.id, 2)
	g.tunnel = g.tunnel.Next()
	g.pass()
	second := g.secrets()
	clean("the start before", first)
	clean("the start that runs", second)

	// Deleted: the volume's key is gone in its sealed form too.
	before := w.sealed(t)
	if status, p := w.call("DELETE", "/v1/vms/web", nil, nil); status != http.StatusOK {
		t.Fatalf("delete: %d %+v", status, p)
	}
	gone := remains{}
	for name, data := range before {
		if _, kept := w.sealed(t)[name]; !kept {
			gone[name] = data
		}
	}
	if len(gone) != 1 {
		t.Errorf("%d keys left the vault with one volume", len(gone))
	}
	clean("the sealed key of a deleted VM", gone)
	clean("a deleted VM", second)

	// What is known to lie there is found, and what is put there.
	digest := g.vm.t1.Digest()
	if found := (remains{"digest": digest[:]}).left(t, w.conf.State); len(found) == 0 {
		t.Error("the digest of T1 is not found in the ledger: the search shows nothing")
	}
	for what, value := range first {
		planted := filepath.Join(w.conf.State, "consoles", "planted")
		check(t, os.WriteFile(planted, append([]byte("left "), base64.StdEncoding.EncodeToString(value)...), 0o600))
		if found := first.left(t, w.conf.State); !slices.Equal(found, []string{what + " in planted"}) {
			t.Errorf("%s was planted, found: %q", what, found)
		}
		check(t, os.Remove(planted))
	}
}

// sealed are the vault's files.
func (w *world) sealed(t *testing.T) map[string][]byte {
	t.Helper()
	all := map[string][]byte{}
	files, err := filepath.Glob(filepath.Join(w.conf.State, "vault", "*"))
	check(t, err)
	for _, file := range files {
		data, err := os.ReadFile(file)
		check(t, err)
		all[filepath.Base(file)] = data
	}
	return all
}
