package hunt

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"foothold/protocol/token"

	"pgregory.net/rapid"
)

func find(t interface{ Fatal(...any) }, data []byte, secrets ...Secret) (forms []string) {
	m, err := NewMatcher(secrets)
	if err != nil {
		t.Fatal(err)
	}
	m.Bytes(data, 0, func(h Hit) { forms = append(forms, h.Secret+" "+h.Form) })
	return slices.Compact(slices.Sorted(slices.Values(forms)))
}

// TestEveryFormIsFound writes a secret in every way, anywhere.
func TestEveryFormIsFound(t *testing.T) {
	ways := map[string]func(before, value, after []byte) []byte{
		"raw": func(b, v, a []byte) []byte { return slices.Concat(b, v, a) },
		"hex": func(b, v, a []byte) []byte { return []byte(hex.EncodeToString(slices.Concat(b, v, a))) },
		"HEX": func(b, v, a []byte) []byte {
			return []byte(strings.ToUpper(hex.EncodeToString(slices.Concat(b, v, a))))
		},
		"base64":     func(b, v, a []byte) []byte { return []byte(base64.StdEncoding.EncodeToString(slices.Concat(b, v, a))) },
		"base64url":  func(b, v, a []byte) []byte { return []byte(base64.URLEncoding.EncodeToString(slices.Concat(b, v, a))) },
		"JSON":       func(b, v, a []byte) []byte { j, _ := json.Marshal(map[string][]byte{"key": v}); return j },
		"at the end": func(b, v, _ []byte) []byte { return slices.Concat(b, v) },
	}
	for name, write := range ways {
		t.Run(name, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				value := rapid.SliceOfN(rapid.Byte(), minSecret, 64).Draw(t, "value")
				before := rapid.SliceOfN(rapid.Byte(), 0, 40).Draw(t, "before")
				after := rapid.SliceOfN(rapid.Byte(), 0, 40).Draw(t, "after")
				if len(find(t, write(before, value, after), Secret{Name: "it", Value: value})) == 0 {
					t.Errorf("not found")
				}
			})
		})
	}
}

func TestFoundAcrossChunks(t *testing.T) {
	value := bytes.Repeat([]byte("secret"), 6)
	for _, at := range []int{0, chunk - len(value), chunk - 1, chunk, 2*chunk - 7, 3 * chunk} {
		data := make([]byte, 3*chunk+len(value))
		copy(data[at:], value)
		count := 0
		m, err := NewMatcher([]Secret{{Name: "it", Value: value}})
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Reader(bytes.NewReader(data), func(h Hit) {
			count++
			if h.Offset != int64(at) {
				t.Errorf("found at %d, want %d", h.Offset, at)
			}
		}); err != nil || count != 1 {
			t.Errorf("at %d: found %d times, %v", at, count, err)
		}
	}
}

// TestFoundBehindZeros: holes are skipped, and not what begins in them.
func TestFoundBehindZeros(t *testing.T) {
	for n := range 12 {
		value := append(make([]byte, n), "a secret of some length"...)
		for before := 90; before < 110; before++ {
			if got := find(t, append(make([]byte, before), value...), Secret{Name: "it", Value: value}); !slices.Equal(got, []string{"it raw"}) {
				t.Errorf("%d zeros of it behind %d others: found %q", n, before, got)
			}
		}
	}
}

func TestTokensAreFoundByTheirForm(t *testing.T) {
	t2 := token.New(token.T2)
	if got := find(t, []byte("a fht2_ and "+t2.Reveal()+"."), Secret{Name: "other", Value: make([]byte, 32)}); !slices.Equal(got, []string{"T2 form"}) {
		t.Errorf("found %q", got)
	}
}

func TestShortSecretsAreRefused(t *testing.T) {
	if _, err := NewMatcher([]Secret{{Name: "it", Value: make([]byte, minSecret-1)}}); err == nil {
		t.Error("accepted")
	}
}

func TestFilesAndProcesses(t *testing.T) {
	dir := t.TempDir()
	value := []byte("a secret of thirty-two bytes.....")
	if err := os.MkdirAll(filepath.Join(dir, "a"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "a", "f"), value, 0o600); err != nil {
		t.Fatal(err)
	}
	m, err := NewMatcher([]Secret{{Name: "it", Value: value}})
	if err != nil {
		t.Fatal(err)
	}
	files, err := m.Files(dir)
	if err != nil || len(files) != 1 || files[0].Kind != File || files[0].Name != filepath.Join(dir, "a", "f") {
		t.Errorf("files: %+v, %v", files, err)
	}
	cmd := exec.Command("sh", "-c", "echo; read wait", string(value))
	cmd.Env = []string{"SECRET=" + hex.EncodeToString(value)}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); cmd.Wait() }()
	if _, err := out.Read(make([]byte, 1)); err != nil { // before it runs, its arguments may not be there yet
		t.Fatal(err)
	}
	found, err := m.Process(cmd.Process.Pid, 0)
	var kinds []string
	for _, f := range found {
		kinds = append(kinds, f.Kind+" "+f.Form)
	}
	for _, want := range []string{Arguments + " raw", Environment + " hex", Memory + " raw", Memory + " hex"} {
		if !slices.Contains(kinds, want) {
			t.Errorf("%s not among %q, %v", want, kinds, err)
		}
	}
}
