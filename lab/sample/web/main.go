// Command web is the lab's sample workload: a page that says where it runs, and a
// look at the intranet, which only a computing VM can reach. It counts its starts in a
// file in STATE_DIRECTORY, where a VM's own volume is, and shows the count.
//
// It listens on port PORT (default 8080). /intranet fetches INTRANET_URL (default
// the lab's intranet page) and shows it or why it cannot be reached. /healthz says ok.
package main

import (
	"errors"
	"fmt"
	"html/template"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// limits of one look at the intranet
const (
	intranetWait = 5 * time.Second
	intranetSize = 64 << 10 // bytes
)

var page = template.Must(template.New("page").Parse(`<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{.Host}}</title></head>
<body><h1>Hello from {{.Host}}</h1>
<p>Kernel {{.Kernel}}, {{.OS}}, up {{.Up}}, start {{.Starts}} on this volume.</p>
<p>You reached this page through the VM's tunnel. <a href="/intranet">The intranet as the VM sees it</a>.</p>
</body></html>
`))

func main() {
	if err := run(); err != nil {
		slog.Error("sample workload ends", "err", err)
		os.Exit(1)
	}
}

func run() error {
	start := time.Now()
	starts, err := countStart(os.Getenv("STATE_DIRECTORY"))
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		host, _ := os.Hostname()
		page.Execute(w, map[string]any{"Host": host, "Kernel": firstLine("/proc/sys/kernel/osrelease"), "OS": osName(),
			"Starts": starts, "Up": time.Since(start).Round(time.Second).String()})
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /intranet", intranet(setting("INTRANET_URL", "http://10.80.0.20/")))
	server := &http.Server{Addr: ":" + setting("PORT", "8080"), Handler: mux, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: time.Minute}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, os.Interrupt)
	go func() {
		<-stop
		server.Close()
	}()
	slog.Info("serving", "address", server.Addr)
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve: %w", err)
	}
	return nil
}

// countStart counts this start in a file of dir and returns how many there were.
func countStart(dir string) (int, error) {
	if dir == "" {
		return 1, nil
	}
	file := filepath.Join(dir, "starts")
	data, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("count starts: %w", err)
	}
	n, _ := strconv.Atoi(string(data)) // none, or not ours: the first
	f, err := os.OpenFile(file, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return 0, fmt.Errorf("count starts: %w", err)
	}
	_, err = f.WriteString(strconv.Itoa(n + 1))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil { // synced: the VM may be killed at any time
		return 0, fmt.Errorf("count starts: %w", err)
	}
	return n + 1, nil
}

// intranet shows what the VM gets from url.
func intranet(url string) http.HandlerFunc {
	client := &http.Client{Timeout: intranetWait}
	return func(w http.ResponseWriter, r *http.Request) {
		answer, err := client.Get(url)
		if err != nil {
			http.Error(w, "the intranet cannot be reached: "+err.Error(), http.StatusBadGateway)
			return
		}
		defer answer.Body.Close()
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		fmt.Fprintf(w, "%s answers %s:\n\n", url, answer.Status)
		io.Copy(w, io.LimitReader(answer.Body, intranetSize))
	}
}

func setting(name, fallback string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return fallback
}

func firstLine(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return "unknown"
	}
	line, _, _ := strings.Cut(string(data), "\n")
	return line
}

func osName() string {
	data, _ := os.ReadFile("/etc/os-release")
	for _, line := range strings.Split(string(data), "\n") {
		if name, ok := strings.CutPrefix(line, "PRETTY_NAME="); ok {
			return strings.Trim(name, `"`)
		}
	}
	return "unknown system"
}
