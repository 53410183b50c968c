package main

import (
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"foothold/client"
	"foothold/internal/mtls"
	"foothold/tenant/authority"
	"foothold/tenant/vault"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"foothold": main})
}

// TestScripts runs the real command line as processes against an orchestrator's API
// that is fake behind its real mutual TLS.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:   "testdata/script",
		Setup: func(env *testscript.Env) error { return serveFake(t, env) },
		Cmds:  map[string]func(*testscript.TestScript, bool, []string){"exits": exits},
	})
}

// exits runs a command and checks its exit code: exits 3 foothold vm create taken
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		got = exit.ExitCode()
	case err != nil:
		ts.Fatalf("%v", err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// serveFake starts the API and writes contexts into the script's folder:
//
//	context.yaml    an operator's
//	stranger.yaml   with a certificate of another organisation
//	daemon.yaml     with a certificate of the right authority's server side
//	away.yaml       an address where nothing listens
func serveFake(t *testing.T, env *testscript.Env) error {
	dir := env.WorkDir
	set, err := newAuthority(filepath.Join(dir, "ours"))
	if err != nil {
		return err
	}
	other, err := newAuthority(filepath.Join(dir, "theirs"))
	if err != nil {
		return err
	}
	operator := authority.Request{Identity: mtls.Identity{Role: mtls.Operator, Name: "alice"}, Usage: authority.Client, Lifetime: time.Hour}
	server := authority.Request{Identity: mtls.Identity{Role: mtls.Orchestrator, Name: "main"}, Usage: authority.Server, Lifetime: time.Hour,
		DNS: []string{"localhost"}, IPs: []netip.Addr{netip.MustParseAddr("127.0.0.1")}}
	files := map[string]mtls.Files{}
	for name, make := range map[string]func() (mtls.Files, error){
		"alice":    func() (mtls.Files, error) { return set.WriteFiles(dir, "alice", authority.Operator, operator) },
		"stranger": func() (mtls.Files, error) { return other.WriteFiles(dir, "stranger", authority.Operator, operator) },
		"api":      func() (mtls.Files, error) { return set.WriteFiles(dir, "api", authority.Operator, server) },
	} {
		if files[name], err = make(); err != nil {
			return err
		}
	}
	addr, err := serveAPI(env, newFakeAPI(), files["api"])
	if err != nil {
		return err
	}
	nobody, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	away := nobody.Addr().String()
	nobody.Close()
	ca := files["alice"].CA
	for name, c := range map[string]client.Context{
		"context":  {Name: "test", Server: addr, CA: ca, Cert: "alice.crt", Key: "alice.key"},
		"stranger": {Name: "stranger", Server: "https://" + addr, CA: ca, Cert: "stranger.crt", Key: "stranger.key"},
		"daemon":   {Name: "daemon", Server: addr, CA: ca, Cert: "api.crt", Key: "api.key"},
		"away":     {Name: "away", Server: away, CA: ca, Cert: "alice.crt", Key: "alice.key"},
	} {
		if err := client.Write(filepath.Join(dir, name+".yaml"), c); err != nil {
			return err
		}
	}
	env.Setenv("XDG_STATE_HOME", filepath.Join(dir, "state"))
	env.Setenv("HOME", dir)
	env.Setenv("TZ", "UTC")
	from := filepath.Join("..", "..", "tenant", "verify", "testdata", "bundles")
	if err := os.CopyFS(filepath.Join(dir, "keys"), os.DirFS(from)); err != nil {
		return err
	}
	for variable, file := range map[string]string{"INVENTORY": "inventory-key", "PLATFORM": "platform-key"} {
		key, err := os.ReadFile(filepath.Join(from, file))
		if err != nil {
			return err
		}
		env.Setenv(variable, string(key))
	}
	env.Setenv("WATCH", keptBundles()[3].Digest.String())
	env.Setenv(client.Variable, filepath.Join(dir, "context.yaml"))
	return nil
}

func newAuthority(dir string) (*authority.Set, error) {
	v, err := vault.Create(filepath.Join(dir, "vault"), filepath.Join(dir, "kek"))
	if err != nil {
		return nil, err
	}
	return authority.Create(v, filepath.Join(dir, "ca"), authority.Operator)
}

// serveAPI serves h as the orchestrator serves operators.
func serveAPI(env *testscript.Env, h http.Handler, files mtls.Files) (string, error) {
	cert, pool, err := files.Load()
	if err != nil {
		return "", err
	}
	srv := httptest.NewUnstartedServer(mtls.Allow(h, mtls.Operator))
	srv.TLS = mtls.ServerConfig(cert, pool, mtls.Operator)
	srv.StartTLS()
	env.Defer(srv.Close)
	return srv.Listener.Addr().String(), nil
}
