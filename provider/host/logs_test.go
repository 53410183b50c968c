package host

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/hostapi"
	"foothold/protocol/imalog"
	"foothold/protocol/imalog/imalogtest"
)

// kernelMeasures makes the world's host one in production, whose kernel has measured these
// files and no launcher any. What the firmware's log says does not matter to an agent.
func (w *world) kernelMeasures(files ...string) {
	w.t.Helper()
	dir := w.t.TempDir()
	w.conf.Log, w.conf.FirmwareLog, w.conf.KernelList = "", filepath.Join(dir, "firmware"), filepath.Join(dir, "kernel")
	w.tpm.Restart()
	for _, path := range files {
		data, err := os.ReadFile(path)
		if err != nil {
			w.t.Fatal(err)
		}
		w.kernelMeasured(path, digest.Of(data))
	}
	if err := os.WriteFile(w.conf.FirmwareLog, []byte("a firmware's log"), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// kernelMeasured adds one entry to the kernel's list.
func (w *world) kernelMeasured(path string, sum digest.SHA256) {
	w.t.Helper()
	list, err := os.OpenFile(w.conf.KernelList, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		w.t.Fatal(err)
	}
	defer list.Close()
	entry, _ := imalogtest.Entry(path, sum[:])
	if _, err := list.Write(entry); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) platformFiles() []string {
	return []string{w.conf.QEMU, w.conf.QEMUModule, w.conf.BIOS, w.conf.LoaderKernel, w.conf.LoaderInitramfs}
}

// An agent in production gives the logs of firmware and kernel as they are after the quote.
func TestAgentGivesTheKernelsLogs(t *testing.T) {
	w := newWorld(t, nil)
	w.kernelMeasures(w.platformFiles()...)
	w.kernelMeasured("/etc/foothold/host.yaml", w.sum)
	w.conf.UserspaceLog = filepath.Join(w.t.TempDir(), "system")
	if err := os.WriteFile(w.conf.UserspaceLog, []byte("a system's log"), 0o600); err != nil {
		t.Fatal(err)
	}
	w.run()
	c := w.client("acme-orchestrator")
	var answer hostapi.QuoteResponse
	quote := func() {
		t.Helper()
		answer = hostapi.QuoteResponse{}
		c.ok("POST", "/v1/quote", hostapi.QuoteRequest{QualifyingData: digest.Of([]byte("nonce"))}, &answer)
	}
	quote()
	if string(answer.Platform.Firmware) != "a firmware's log" || string(answer.Platform.Userspace) != "a system's log" || answer.Platform.Log != nil {
		t.Errorf("beside a quote: %+v", answer.Platform)
	}
	first := len(answer.Platform.Kernel)
	w.kernelMeasured("/usr/bin/other", digest.Of([]byte("other")))
	quote()
	var alone evidence.Platform
	c.ok("GET", "/v1/platform", nil, &alone)
	for what, p := range map[string]evidence.Platform{"beside a quote": answer.Platform, "alone": alone} {
		list, err := imalog.Parse(p.Kernel)
		if err != nil || len(p.Kernel) <= first || list.Entries[len(list.Entries)-1].Path != "/usr/bin/other" {
			t.Errorf("%s: the list has %d bytes, %d before it grew; %v", what, len(p.Kernel), first, err)
		}
	}
	// The answer is compressed for who takes that; a list of thousands of files takes room.
	for i := range 500 {
		w.kernelMeasured("/usr/lib/"+strings.Repeat("x", i%100), digest.Of([]byte{byte(i)}))
	}
	req, err := http.NewRequest("GET", c.base+"/v1/platform", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept-Encoding", "gzip")
	rsp, err := c.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer rsp.Body.Close()
	z, err := gzip.NewReader(rsp.Body)
	if err != nil {
		t.Fatalf("not compressed: %v", err)
	}
	if err := json.NewDecoder(z).Decode(&alone); err != nil || len(alone.Kernel) < 50000 {
		t.Errorf("%d bytes, %v", len(alone.Kernel), err)
	}
	// Without its logs a quote proves nothing, and the tenant hears why.
	if err := os.Remove(w.conf.KernelList); err != nil {
		t.Fatal(err)
	}
	c.refused("POST", "/v1/quote", hostapi.QuoteRequest{QualifyingData: digest.Of([]byte("nonce"))}, "logs-unreadable")
	c.refused("GET", "/v1/platform", nil, "logs-unreadable")
	large := make([]byte, imalog.MaxSize+1)
	if err := os.WriteFile(w.conf.KernelList, large, 0o600); err != nil {
		t.Fatal(err)
	}
	c.refused("GET", "/v1/platform", nil, "logs-unreadable")
}

func TestAgentRefusesWhatTheKernelDidNotMeasure(t *testing.T) {
	base := newWorld(t, nil)
	files := base.platformFiles()
	for i, missing := range append(files, "configuration") {
		w := *base
		w.kernelMeasures(append(append([]string{}, files[:min(i, len(files))]...), files[min(i+1, len(files)):]...)...)
		if missing != "configuration" {
			w.kernelMeasured("/etc/foothold/host.yaml", w.sum)
		}
		if err := Run(context.Background(), w.conf, w.sum); err == nil || !strings.Contains(err.Error(), "the kernel's policy") {
			t.Errorf("without %s: it ran: %v", filepath.Base(missing), err)
		}
	}
	// An entry that says that the file was being written to is no measurement of it.
	w := *base
	w.kernelMeasures(files...)
	w.kernelMeasured("/etc/foothold/host.yaml", w.sum)
	data, err := os.ReadFile(w.conf.KernelList)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(w.conf.KernelList, bytes.ReplaceAll(data, bytes.Repeat([]byte{1}, 20), make([]byte, 20)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Run(context.Background(), w.conf, w.sum); err == nil || !strings.Contains(err.Error(), "the kernel's policy") {
		t.Errorf("with violations alone: it ran: %v", err)
	}
}
