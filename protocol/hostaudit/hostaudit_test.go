package hostaudit_test

import (
	"bytes"
	"crypto/ed25519"
	"strings"
	"testing"

	"foothold/protocol/hostaudit"
	"foothold/protocol/signed"
)

func printed(t testing.TB) (string, ed25519.PublicKey) {
	t.Helper()
	m := hostaudit.Medium{Seed: bytes.Repeat([]byte{7}, 32)}
	key, err := m.Key()
	if err != nil {
		t.Fatal(err)
	}
	text, err := hostaudit.Print(signed.Seal(key, signed.HostAudit, []byte(`{"number":"`+strings.Repeat("ab", 16)+`","host":"alpha"}`)))
	if err != nil {
		t.Fatal(err)
	}
	return text, key.Public().(ed25519.PublicKey)
}

func TestReportPassesAConsole(t *testing.T) {
	text, key := printed(t)
	for _, line := range strings.Split(text, "\n") {
		if len(line) > 80 {
			t.Errorf("a line has %d bytes; a terminal would break it", len(line))
		}
	}
	env, err := hostaudit.Read([]byte("[ 1.0] kernel\r\n" + strings.ReplaceAll(text, "\n", "\r\n") + "foothold-audit 2.0 done\r\n"))
	if err != nil {
		t.Fatal(err)
	}
	var r hostaudit.Report
	if err := env.Open(key, signed.HostAudit, &r); err != nil || r.Host != "alpha" {
		t.Fatalf("%+v, %v", r, err)
	}
}

func TestReadRefuses(t *testing.T) {
	text, _ := printed(t)
	for what, console := range map[string]string{
		"nothing":     "",
		"no end":      strings.TrimSuffix(text, hostaudit.End+"\n"),
		"two reports": text + text,
		"garbled":     strings.Replace(text, "\n", "\n!", 1),
		"a line lost": strings.Join(slicesWithout(strings.Split(text, "\n"), 2), "\n"),
		"too large":   hostaudit.Begin + "\n" + strings.Repeat("A", 3*hostaudit.MaxReport) + "\n" + hostaudit.End,
	} {
		if _, err := hostaudit.Read([]byte(console)); err == nil {
			t.Errorf("%s is taken for a report", what)
		}
	}
}

func slicesWithout(list []string, i int) []string {
	return append(append([]string{}, list[:i]...), list[i+1:]...)
}

func FuzzRead(f *testing.F) {
	text, key := printed(f)
	f.Add([]byte(text))
	f.Add([]byte(hostaudit.Begin + "\n\n" + hostaudit.End))
	f.Fuzz(func(t *testing.T, data []byte) {
		env, err := hostaudit.Read(data)
		if err != nil {
			return
		}
		var r hostaudit.Report
		if env.Open(key, signed.HostAudit, &r) == nil && r.Host != "alpha" {
			t.Errorf("another report passes for the signed one: %+v", r)
		}
	})
}
