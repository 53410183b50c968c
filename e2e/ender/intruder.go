package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"time"
)

// callLimit bounds one call of a service: a refusal comes at once.
const callLimit = 5 * time.Second

// intrude serves as root, at the port that was the workload's, whoever has taken the VM over.
//
//	/run?do=SCRIPT&in=TEXT   what the shell's script says, given that input
//	/call?to=ADDRESS         what a service says to a certificate of our own making
//	/leave                   it ends
func intrude(_, port string) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /run", func(w http.ResponseWriter, r *http.Request) {
		cmd := exec.CommandContext(r.Context(), "/bin/sh", "-ec", r.FormValue("do"))
		cmd.Stdin = strings.NewReader(r.FormValue("in"))
		out, err := cmd.CombinedOutput()
		if err != nil {
			http.Error(w, fmt.Sprintf("%s%v", out, err), http.StatusInternalServerError)
			return
		}
		w.Write(out)
	})
	mux.HandleFunc("GET /call", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, call(r.FormValue("to")))
	})
	server := &http.Server{Addr: ":" + port, Handler: mux}
	left := make(chan error, 1)
	mux.HandleFunc("GET /leave", func(w http.ResponseWriter, r *http.Request) {
		go func() { left <- server.Shutdown(context.WithoutCancel(r.Context())) }() // once this is answered
	})
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve: %w", err)
	}
	return <-left
}

// call asks a service for a page, and says how far that came.
func call(to string) string {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err.Error()
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err.Error()
	}
	own := &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: callLimit}, "tcp", to, &tls.Config{
		InsecureSkipVerify:   true, // an intruder believes any server
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return own, nil },
	})
	if err != nil {
		return "no connection: " + err.Error()
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(callLimit))
	fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", to)
	answer, err := io.ReadAll(io.LimitReader(conn, 1<<10))
	if len(answer) > 0 {
		return fmt.Sprintf("answered: %q", answer)
	}
	return fmt.Sprintf("sent away: %v", err)
}
