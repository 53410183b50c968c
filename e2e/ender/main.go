// Command ender is the workload of a VM that is to be ended, or taken over, from inside.
// Its page says how many starts its volume has seen, as the lab's sample does, and whether
// the VM's kernel may be replaced. /ask?for=URL has it ask for another page from then on,
// over and over. /end/HOW leaves the word HOW
// on the volume and ends the program. A workload may do no more; what is in root/, which
// a test puts into a template, then does it as root: a reboot or a poweroff by the service
// manager, or a crash of the kernel; or it runs this program again, as an intruder.
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"
)

// endings are the words that root/ knows.
var endings = []string{"reboot", "crash", "poweroff", "intruder"}

// Of asking for another page: how long that may take, and the pause before the next.
const (
	askWait  = time.Second
	askPause = 100 * time.Millisecond
)

func main() {
	program := run
	if os.Geteuid() == 0 { // a workload has a user of its own
		program = intrude
	}
	if err := program(os.Getenv("STATE_DIRECTORY"), os.Getenv("PORT")); err != nil {
		slog.Error("workload ends", "err", err)
		os.Exit(1)
	}
}

// run serves until it is told how to end.
func run(dir, port string) error {
	file := filepath.Join(dir, "starts")
	data, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("count starts: %w", err)
	}
	starts, _ := strconv.Atoi(string(data)) // none yet: the first
	starts++
	if err := write(file, strconv.Itoa(starts)); err != nil {
		return fmt.Errorf("count starts: %w", err)
	}
	mux := http.NewServeMux()
	server := &http.Server{Addr: ":" + port, Handler: mux}
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		kexec, err := os.ReadFile("/proc/sys/kernel/kexec_load_disabled")
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		fmt.Fprintf(w, "start %d on this volume\nkexec disabled: %s", starts, kexec)
	})
	mux.HandleFunc("GET /ask", func(w http.ResponseWriter, r *http.Request) {
		go keepAsking(r.FormValue("for"))
		fmt.Fprintln(w, "asks")
	})
	ended := make(chan error, 1)
	mux.HandleFunc("GET /end/{how}", func(w http.ResponseWriter, r *http.Request) {
		how := r.PathValue("how")
		if !slices.Contains(endings, how) {
			http.NotFound(w, r)
			return
		}
		if err := write(filepath.Join(dir, "wish"), how); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		fmt.Fprintln(w, how)
		go func() { ended <- server.Shutdown(context.WithoutCancel(r.Context())) }() // once this is answered
	})
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve: %w", err)
	}
	return <-ended
}

// keepAsking asks for a page for as long as the VM runs, each time on a connection of its own.
func keepAsking(url string) {
	client := &http.Client{Timeout: askWait, Transport: &http.Transport{DisableKeepAlives: true}}
	for {
		if answer, err := client.Get(url); err == nil { // who is asked is looked at, not the answer
			answer.Body.Close()
		}
		time.Sleep(askPause)
	}
}

// write replaces a file, on disk before it returns: the VM may end at any time.
func write(file, text string) error {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Sync(), f.Close())
}
