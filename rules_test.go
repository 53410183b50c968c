// Package foothold_test holds the rules of the tree that matter enough to be tests.
package foothold_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// pkg is what `go list` says of a package.
type pkg struct {
	ImportPath string
	Dir        string
	Doc        string
	Name       string
	GoFiles    []string
	Imports    []string
	Deps       []string
	Standard   bool
	Module     *struct{ Path string }
}

func list(t *testing.T, args ...string) []pkg {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json"}, args...)...)
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v: %s", err, &complaints)
	}
	var all []pkg
	for dec := json.NewDecoder(bytes.NewReader(out)); dec.More(); {
		var p pkg
		if err := dec.Decode(&p); err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	if len(all) == 0 {
		t.Fatal("go list found nothing")
	}
	return all
}

// place is the folder below the module in which a package lies: tenant, dmz, ...
func place(path string) string {
	rest, ok := strings.CutPrefix(path, "foothold/")
	if !ok {
		return ""
	}
	first, _, _ := strings.Cut(rest, "/")
	return first
}

// may lists which folders a folder's packages may import. A folder that is missing
// here may import nothing of the module, so a new one must be thought about.
var may = map[string][]string{
	"protocol": {"protocol", "internal"},
	"internal": {"internal", "protocol"},
	"tenant":   {"tenant", "protocol", "internal"},
	"dmz":      {"dmz", "protocol", "internal"},
	"provider": {"provider", "protocol", "internal"},
	"guest":    {"guest", "protocol", "internal"},
	"client":   {"client", "protocol", "internal"},
	// The lab stands for everyone: it makes each organisation's ground.
	"lab": {"lab", "client", "tenant", "dmz", "provider", "protocol", "internal"},
	"cmd": {"lab", "client", "tenant", "dmz", "provider", "guest", "protocol", "internal"},
	"e2e": {"e2e", "lab", "client", "tenant", "dmz", "provider", "protocol", "internal"},
}

func TestPlacesDoNotImportEachOther(t *testing.T) {
	for _, p := range list(t, "./...") {
		from := place(p.ImportPath)
		for _, imp := range p.Imports {
			if to := place(imp); to != "" && !slices.Contains(may[from], to) {
				t.Errorf("%s imports %s", p.ImportPath, imp)
			}
		}
	}
}

// Binaries that are measured or delivered hold one place's code only.
func TestBinariesHoldOnePlace(t *testing.T) {
	for binary, own := range map[string]string{"foothold-host": "provider", "foothold-loader": "guest", "foothold-guest": "guest", "foothold-audit": "guest"} {
		for _, p := range list(t, "./cmd/"+binary) {
			for _, dep := range p.Deps {
				if to := place(dep); to != "" && !slices.Contains([]string{own, "protocol", "internal"}, to) {
					t.Errorf("%s depends on %s", binary, dep)
				}
			}
		}
	}
}

// The protocol is types and encoding: no input or output, no clock, no policy.
func TestProtocolIsPure(t *testing.T) {
	allowed := []string{"foothold/internal/secret", "foothold/internal/strictjson", "foothold/internal/mtls"}
	forbidden := []string{"net", "net/http", "os", "os/exec", "io/ioutil", "log", "database/sql", "golang.org/x/sys/unix"}
	for _, p := range list(t, "./protocol/...") {
		for _, imp := range p.Imports {
			if slices.Contains(forbidden, imp) || place(imp) == "internal" && !slices.Contains(allowed, imp) {
				t.Errorf("%s imports %s", p.ImportPath, imp)
			}
		}
	}
}

func TestPackagesAreDocumented(t *testing.T) {
	for _, p := range list(t, "./...") {
		if len(p.GoFiles) > 0 && len(strings.Fields(p.Doc)) < 4 {
			t.Errorf("%s has no doc comment that says what it is for", p.ImportPath)
		}
	}
}

func TestNoGrabBags(t *testing.T) {
	for _, p := range list(t, "./...") {
		switch p.Name {
		case "util", "utils", "common", "helper", "helpers", "types", "models", "constants", "misc", "base", "shared":
			t.Errorf("%s: call a package by what it is for", p.ImportPath)
		}
	}
}

// No package does work when it is loaded.
func TestNoInit(t *testing.T) {
	for _, p := range list(t, "./...") {
		for _, file := range p.GoFiles {
			if bytes.Contains(read(t, filepath.Join(p.Dir, file)), []byte("\nfunc init() {")) {
				t.Errorf("%s/%s has an init function", p.ImportPath, file)
			}
		}
	}
}

func read(t *testing.T, file string) []byte {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestTreeHoldsSourceOnly(t *testing.T) {
	const limit = 256 << 10 // bytes; go.sum and the longest page are far below
	out, err := exec.Command("git", "ls-files", "-z").Output()
	if err != nil {
		t.Fatalf("git ls-files: %v", err)
	}
	for _, file := range strings.Split(strings.TrimSuffix(string(out), "\x00"), "\x00") {
		info, err := os.Stat(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed, not yet committed
		}
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() > limit {
			t.Errorf("%s has %d bytes: what is built or fetched is not kept", file, info.Size())
		}
	}
}

// What the repository says must hold outside the machine that it was written on.
func TestTreeStandsAlone(t *testing.T) {
	out, err := exec.Command("git", "ls-files", "-z").Output()
	if err != nil {
		t.Skipf("not a git clone: %v", err)
	}
	forbidden := []string{"../sh" + "ared", "/work" + "/", "/root" + "/wt", "PRE" + "AMBLE.md", "CON" + "TRACT.md"}
	for _, name := range strings.Split(strings.TrimRight(string(out), "\x00"), "\x00") {
		info, err := os.Lstat(name)
		if err != nil || !info.Mode().IsRegular() {
			continue
		}
		data := read(t, name)
		for _, text := range forbidden {
			if bytes.Contains(data, []byte(text)) {
				t.Errorf("%s mentions %s", name, text)
			}
		}
	}
}

// A direct dependency has its reason in a decision record, and no record outlives its
// dependency.
func TestDependenciesAreReasoned(t *testing.T) {
	out, err := exec.Command("go", "mod", "edit", "-json").Output()
	if err != nil {
		t.Fatalf("go mod edit: %v", err)
	}
	var mod struct {
		Require []struct {
			Path     string
			Indirect bool
		}
	}
	if err := json.Unmarshal(out, &mod); err != nil {
		t.Fatal(err)
	}
	var direct []string
	for _, r := range mod.Require {
		if !r.Indirect {
			direct = append(direct, r.Path)
		}
	}
	var reasoned []string
	for line := range strings.Lines(string(read(t, "docs/decisions/002-dependencies.md"))) {
		cells := strings.Split(line, "|")
		if len(cells) < 5 || !strings.Contains(cells[1], ".") {
			continue
		}
		for _, m := range strings.Split(cells[1], ",") {
			reasoned = append(reasoned, strings.TrimSpace(m))
		}
	}
	slices.Sort(direct)
	slices.Sort(reasoned)
	if len(direct) == 0 || !slices.Equal(direct, reasoned) {
		t.Errorf("go.mod requires directly\n%q,\nthe record gives reasons for\n%q", direct, reasoned)
	}
}

// measured caps what the measured and the delivered binaries consist of. A new module
// here is a new author whom every host or VM trusts.
var measured = map[string]struct {
	modules []string
	size    int64 // bytes, stripped
}{
	"foothold-loader": {[]string{
		"github.com/cavaliergopher/cpio", "github.com/vishvananda/netlink", "github.com/vishvananda/netns", "golang.org/x/sys",
	}, 8 << 20},
	"foothold-host": {[]string{
		"github.com/goccy/go-yaml", "github.com/google/go-tpm", "github.com/vishvananda/netlink", "github.com/vishvananda/netns", "golang.org/x/sys",
	}, 10 << 20},
}

func TestMeasuredBinariesStaySmall(t *testing.T) {
	for binary, want := range measured {
		modules := map[string]bool{}
		for _, p := range list(t, "-deps", "./cmd/"+binary) {
			if p.Module != nil && p.Module.Path != "foothold" {
				modules[p.Module.Path] = true
			}
		}
		for m := range modules {
			if !slices.Contains(want.modules, m) {
				t.Errorf("%s depends on %s, which is not among the modules it may have", binary, m)
			}
		}
		file := filepath.Join(t.TempDir(), binary)
		build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", file, "./cmd/"+binary)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v: %s", binary, err, out)
		}
		info, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() > want.size {
			t.Errorf("%s has %d bytes, its cap is %d", binary, info.Size(), want.size)
		}
		t.Logf("%s: %d modules, %d bytes", binary, len(modules), info.Size())
	}
}
